"""The platform around dxmi: configuration and the command line."""
