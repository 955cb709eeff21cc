"""The command line `dxmi`."""
