-- How the last audit and the last pruning of this shard ended; NaN where there was none.
SELECT coalesce(extract(epoch FROM audited_at)::float8, 'NaN') AS audited_at,
       coalesce(differences::float8, 'NaN') AS differences,
       coalesce(extract(epoch FROM oldest_operation_at)::float8, 'NaN') AS oldest_operation_at
FROM upkeep
