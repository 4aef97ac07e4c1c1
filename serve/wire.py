"""What the service and its client write on the wire: content types, headers, and what names a problem."""

JSON = "application/json"
FLOAT32, FLOAT16 = "application/x-mvmr-float32", "application/x-mvmr-float16"
PROBLEM = "application/problem+json"
PROBLEM_TYPE = "urn:mvmr:problem:"  # followed by the problem's name

API_KEY = "x-api-key"
SPACE = "x-embedding-space"
SHAPE, ERRORS = "x-shape", "x-errors"  # of a binary answer
JSON_LENGTH = "inference-header-content-length"  # of a body in which binary tensors follow the JSON
