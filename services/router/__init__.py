"""The router: decides which version and which worker answer a request, and sees it answered.

Reading order: settings, __main__, app (wiring); dispatch (a gateway's frames), routed and call (one request's
way), routing_table with common's experiments and targeting (which version), endpoints, group, balancing and
outliers (which worker), retry_budget, waiting, hedging; result_cache, cache_key, result_store; shadow,
comparison; prediction_log, span, stats, metrics, snapshot, grpc_server.
"""
