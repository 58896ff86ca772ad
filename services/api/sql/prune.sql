-- Removes old operations of one partition, and adds what they carried to score_ops_pruned: one
-- statement, so that in every snapshot the two together make up the scores.
--
-- {partition} is the end of the partition's name. $1 first and $2 last place (excluded) of the stretch
-- of the table to look at, $3 age in seconds, $4 how many rows at most.
-- Returns how many were removed, the last one's place, and when the oldest of those to be kept was
-- written.
--
-- * The places bound what is read, and spare writers an index on created_at.
-- * No writer waits: none touches an old row, but for the replay of a key as old as that.
-- * The rows are named (ctid = ANY), so the LIMIT holds for the DELETE.
-- * A partition that is being moved is not written to: INSERT finds no place for it (23514).
WITH gone AS (
    DELETE FROM score_ops_{partition}
    WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM score_ops_{partition}
        WHERE ctid >= $1::tid AND ctid < $2::tid
          AND created_at < LOCALTIMESTAMP - make_interval(secs => $3)
        LIMIT $4
    ))
    RETURNING ctid, user_id, delta
), carried AS (
    INSERT INTO score_ops_pruned AS held (user_id, delta, operations)
    SELECT user_id, sum(delta::bigint), count(*)
    FROM gone
    GROUP BY user_id
    ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE
        SET delta = held.delta + excluded.delta, operations = held.operations + excluded.operations
)
SELECT count(*) AS removed, max(ctid) AS last,
       (SELECT min(created_at) FROM score_ops_{partition}
        WHERE ctid >= $1::tid AND ctid < $2::tid
          AND created_at >= LOCALTIMESTAMP - make_interval(secs => $3)) AS oldest_kept_at
FROM gone
