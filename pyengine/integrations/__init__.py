"""What the library does through other libraries. Each module is imported only where it is asked for."""
