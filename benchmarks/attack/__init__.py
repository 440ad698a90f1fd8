"""Every hostile or unlucky case against the real server in one run, with figures."""
