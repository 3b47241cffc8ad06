"""Numbers that others, or this package on another machine, have published; README.md says where they come from."""
