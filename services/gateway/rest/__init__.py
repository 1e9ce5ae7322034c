"""Everything that is not hot, as a FastAPI application; and the hot routes once more, so that the same
answers can be had through ASGI. Read in this order: app (composition), door (request ids, callers, bodies,
errors), hot_routes, outcomes, v2_routes, v2_statistics, shared_memory_routes, batch, openai_routes (with
multipart), async_routes, dead_letter_routes, management (the way to the other services), documents (OpenAPI
of the hot routes), docs (OpenAPI of all)."""
