"""Tools for finding and proving configs; loaded on request, never by a convolution."""
