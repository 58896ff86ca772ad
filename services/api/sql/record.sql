-- Adds increments and writes the operation rows that make each of them count once: one statement,
-- one commit, for many users.
--
-- $1 user ids, $2 operation ids, $3 increments; no pair of user and operation twice.
-- Returns a row for each operation that was added: its score right after it, and the user's latest.
--
-- * An operation that is recorded already violates the key of score_ops and undoes the whole
--   statement (23505). The scores are raised first so that a twin in flight elsewhere is waited for
--   at the user's row.
-- * A user whose score would not fit is left out by the WHERE, and so are the operations.
-- * Rows are touched in the order of user ids, so that two statements cannot deadlock.
-- * Nothing is joined with a partitioned table: that plans badly over 256 partitions. INSERT routes.
WITH operation AS (
    SELECT user_id, op_id, delta,
           sum(delta::bigint) OVER (PARTITION BY user_id ORDER BY place) AS up_to_it
    FROM unnest($1::varchar[], $2::varchar[], $3::integer[])
         WITH ORDINALITY AS given (user_id, op_id, delta, place)
), total AS (
    SELECT user_id, sum(delta::bigint) AS delta FROM operation GROUP BY user_id
), raised AS (
    INSERT INTO user_scores AS held (user_id, score, last_updated)
    SELECT user_id, delta::integer, clock_timestamp()
    FROM total
    WHERE delta <= 2147483647
    ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE
        -- clock_timestamp() here is read once the row is ours: when the score was really reached.
        SET score = held.score + excluded.score, last_updated = clock_timestamp()
        WHERE held.score <= 2147483647 - excluded.score
    RETURNING user_id, score, last_updated
), kept AS (
    INSERT INTO score_ops (user_id, op_id, delta, score, created_at)
    SELECT user_id, op_id, operation.delta,
           raised.score - total.delta + operation.up_to_it, raised.last_updated
    FROM operation JOIN total USING (user_id) JOIN raised USING (user_id)
    ORDER BY user_id, op_id
    RETURNING user_id, op_id, delta, score
)
SELECT user_id, op_id, kept.delta, kept.score, raised.score AS latest,
       (extract(epoch FROM raised.last_updated) * 1000000)::bigint AS reached_us
FROM kept JOIN raised USING (user_id)
