-- ARGV: for each message: id, digest, seconds to hold.
local time = redis.call('TIME')
local count = 0
for i = 1, #ARGV, 3 do
  local id, digest = ARGV[i], ARGV[i + 1]
  if redis.call('ZREM', 'smtpdup:staged', id) == 1 then
    redis.call('ZADD', 'smtpdup:uncertain', time[1] + tonumber(ARGV[i + 2]), id)
    if digest ~= '' then
      -- A client may lose our reply more than once: every attempt is a twin of the next.
      local ids = redis.call('HGET', 'smtpdup:twins', digest)
      redis.call('HSET', 'smtpdup:twins', digest, ids and (ids .. ' ' .. id) or id)
    end
    count = count + 1
  end
end
return count
