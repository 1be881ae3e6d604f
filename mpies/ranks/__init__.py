"""What ranks do together: starting, exchanging, failing, waiting; which device and memory is whose."""
