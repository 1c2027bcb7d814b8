"""A service under hostile input, overload and a frozen database: what it answers, and how soon."""
