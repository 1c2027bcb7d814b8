"""A client for pages, and its tests in Chromium."""
