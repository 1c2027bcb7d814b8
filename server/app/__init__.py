"""The only place where the parts are put together: the parent process and those it starts."""
