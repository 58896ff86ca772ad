"""Every metric of an API replica.

Label values come from small fixed sets, never from a request: a user as a label is a memory leak.
"""

from prometheus_client import Counter, Gauge, Histogram

# Resolves the objective of deploy/prometheus/rules, 99 % of updates within 250 ms, and the deadlines.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

REQUESTS = Counter(
    "scoreboard_http_requests_total", "Requests answered", ["route", "method", "status"]
)
REQUEST_SECONDS = Histogram(
    "scoreboard_http_request_duration_seconds",
    "From the request's head to the end of its answer",
    ["route"],
    buckets=_SECONDS,
)
QUEUE = Gauge("scoreboard_write_queue_operations", "Increments waiting for a shard", ["shard"])
QUEUE_LIMIT = Gauge("scoreboard_write_queue_limit_operations", "How many may wait for one shard")
BATCH_OPERATIONS = Histogram(
    "scoreboard_write_batch_operations",
    "Increments in one commit",
    ["shard"],
    buckets=(1, 2, 5, 10, 25, 50, 100, 250, 500),
)
BATCH_SECONDS = Histogram(
    "scoreboard_write_batch_duration_seconds",
    "A commit, retries included",
    ["shard"],
    buckets=_SECONDS,
)
WRITE_RETRIES = Counter(
    "scoreboard_write_retries_total", "Increments tried again, each time", ["shard"]
)
RETRIES_REFUSED = Counter(
    "scoreboard_write_retry_budget_exhausted_total",
    "Increments not tried again, because the shard's retries were a tenth of its traffic already",
    ["shard"],
)
RESTING = Gauge(
    "scoreboard_shard_resting",
    "1 from when a shard did not take increments until it has taken one",
    ["shard"],
)
WRITE_FAILURES = Counter(
    "scoreboard_write_failures_total", "Increments given up after retries", ["shard"]
)
REDIS_UP = Gauge(
    "scoreboard_redis_up", "1 if the leaderboard's Redis answered when last asked, else 0"
)
ANNOUNCED = Counter(
    "scoreboard_leaderboard_scores_total",
    "Committed scores by what was done with them: sent to Redis, below its floor, or failed",
    ["outcome"],
)
REBUILDS = Counter(
    "scoreboard_leaderboard_rebuilds_total",
    "Comparisons of the board in Redis with PostgreSQL",
    ["outcome"],
)
QUOTA_FALLBACKS = Counter(
    "scoreboard_quota_fallbacks_total", "Quota checks made without Redis", ["quota"]
)
TOP_READS = Counter(
    "scoreboard_top_reads_total", "Where a read of the top 10 came from", ["source"]
)
SHARD_UP = Gauge(
    "scoreboard_shard_up", "1 if the shard answered when last asked, else 0", ["shard"]
)
PRUNED = Counter(
    "scoreboard_operations_pruned_total", "Old operations removed by this replica", ["shard"]
)
PRUNE_FAILURES = Counter(
    "scoreboard_prune_failures_total", "Passes over a shard's operations that failed", ["shard"]
)
OLDEST_OPERATION = Gauge(
    "scoreboard_oldest_operation_timestamp_seconds",
    "When the oldest operation was written that the last pass, any replica's, has left",
    ["shard"],
)
AUDIT_DIFFERENCES = Gauge(
    "scoreboard_audit_differences",
    "Users whose score was not the sum of their operations in the shard's last audit",
    ["shard"],
)
AUDIT_FINISHED = Gauge(
    "scoreboard_audit_finished_timestamp_seconds", "When that audit ended", ["shard"]
)
