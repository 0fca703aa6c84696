"""Write a package, all or nothing: its files, its card, and the folder that it replaces."""
