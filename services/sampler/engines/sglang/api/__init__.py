"""SGLang's own interfaces: command line, process, HTTP requests and responses."""
