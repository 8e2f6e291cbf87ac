"""Between server and worker: messages, weights on their way, and the sockets under them."""
