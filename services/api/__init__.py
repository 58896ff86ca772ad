"""The HTTP API: takes increments, makes them durable once, ranks and announces them."""
