"""Bytes of the public protocols to tensors and back; pure, but for what `places` writes. Read in this order:
numbers (long lists of them), tensors (nested lists to a tensor), explain (why a value is not one), rows (the
shapes native inputs may have), native (the native routes), attributes (what experiments may target),
rows_body and compiled (the most common of them), priority, results (tensors to JSON), v2_lists (what is long
in a body of V2), v2, places (tensors in shared memory), classes (the best ones as texts), v2_forms,
v2_learning and v2_answers (Open Inference Protocol over REST), oip, infer_forms, streamed and trailers (over
gRPC), openai (`/v1/embeddings`)."""
