"""Push a package to a Hub as one verified commit."""
