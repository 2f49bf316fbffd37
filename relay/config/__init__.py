"""The settings: every option once, files, variables and flags to one frozen Settings."""
