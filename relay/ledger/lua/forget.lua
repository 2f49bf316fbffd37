-- ARGV: destination. Deletes it with all its keys, if it has no copies. Returns the numbers of pending, failed and leased
-- copies: all 0 if it is deleted.
local name = ARGV[1]
local time = redis.call('TIME')
local pending = redis.call('ZCARD', 'smtpdup:pending:' .. name)
local failed = redis.call('ZCARD', 'smtpdup:failed:' .. name)
local busy = redis.call('ZCOUNT', 'smtpdup:busy:' .. name, time[1], '+inf')
if pending == 0 and failed == 0 and busy == 0 then
  for _, group in ipairs(redis.call('ZRANGE', 'smtpdup:divergence:' .. name, 0, -1)) do
    for _, kind in ipairs({'diverged', 'examples', 'whom', 'sealed'}) do
      redis.call('DEL', 'smtpdup:' .. kind .. ':' .. name .. ':' .. group)
    end
  end
  for _, kind in ipairs({'own', 'busy', 'holders', 'failure', 'health', 'divergence', 'domains', 'outages', 'probed'}) do
    redis.call('DEL', 'smtpdup:' .. kind .. ':' .. name)
  end
  for _, counter in ipairs({'delivered', 'failed', 'body_missing'}) do
    redis.call('HDEL', 'smtpdup:counters', counter .. ':' .. name)
  end
  redis.call('HDEL', 'smtpdup:destinations', name)
  redis.call('SREM', 'smtpdup:lists', name)
end
return {pending, failed, busy}
