"""The command line: one file for each command or pair of commands. May use everything."""
