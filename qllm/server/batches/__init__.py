"""OpenAI's Batch API: files of requests that are answered as the server has room, and survive its end."""
