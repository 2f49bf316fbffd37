-- ARGV: place ("host state-dir process"), our owner part, seconds to hold. What a dead predecessor at our place
-- had staged becomes uncertain: it never got our 2xx. Returns the ids. The digest for twins is added by the reconciler.
local time = redis.call('TIME')
local held = {}
local gone = {}
local all = redis.call('HGETALL', 'smtpdup:owners')
for i = 1, #all, 2 do
  if all[i + 1] == ARGV[1] and all[i] ~= ARGV[2] then
    gone[all[i]] = true
    redis.call('HDEL', 'smtpdup:owners', all[i])
  end
end
if next(gone) then
  for _, id in ipairs(redis.call('ZRANGE', 'smtpdup:staged', 0, -1)) do
    if gone[string.sub(id, 10, 13)] then
      redis.call('ZREM', 'smtpdup:staged', id)
      redis.call('ZADD', 'smtpdup:uncertain', time[1] + tonumber(ARGV[3]), id)
      held[#held + 1] = id
    end
  end
end
redis.call('HSET', 'smtpdup:owners', ARGV[2], ARGV[1])
return held
