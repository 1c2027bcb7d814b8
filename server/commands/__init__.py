"""The commands of `productgraph` that come in groups, one module for each group."""
