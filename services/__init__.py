"""The processes. Each subpackage is one process; api and gateway never import each other."""
