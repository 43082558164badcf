"""The command line: its options, one run of it, its progress, and the process around it."""
