"""A retriever with Search-R1's HTTP interface over BM25."""
