"""The current process: its CPU cores, its memory allocator and its signal handlers."""
