"""How KV blocks get from one instance's pool into another's: shared memory on a host, gloo between hosts, Ray's object store."""
