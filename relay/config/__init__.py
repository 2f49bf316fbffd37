"""The settings: all options, and the reading of files, variables and flags into one frozen Settings."""
