"""Files and folders that are whole or not there, whatever the moment at which a process is killed."""
