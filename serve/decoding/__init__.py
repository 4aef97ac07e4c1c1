"""Images of strangers decoded where it can be stopped: in processes with limits of time and memory."""
