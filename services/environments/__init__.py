"""The environment protocol, and question answering with search."""
