"""One SGLang server: started, asked over HTTP, limited, given new weights."""
