"""What the tests run: a Hub server, ways to spoil a package, and scripts that are run as processes of their own."""
