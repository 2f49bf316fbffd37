"""Redis as a server: clients, pipelines, whether it can be written, and the embedded one."""
