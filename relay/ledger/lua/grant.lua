-- KEYS: the bucket of a destination, the workers that share it. ARGV: worker, copies a second (0 for no bound), how many
-- are wanted. Returns how many may begin, and which of how many workers this is. One that is new has no place as yet, 0,
-- until the others had the time to make room. A bucket holds what one second lets through, and a worker gets its share.
local now = clock()
local worker, rate, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('HSETNX', KEYS[2], worker, '')
local names = {}
local all = redis.call('HGETALL', KEYS[2])
local born = now
for n = 1, #all, 2 do
  local from, seen = string.match(all[n + 1], '^(%S+) (%S+)$')
  from, seen = tonumber(from or ''), tonumber(seen or '')
  if all[n] == worker then
    born = seen and now - seen < 5 and from or now
  elseif not seen or now - seen >= 5 or seen > now + 5 then
    redis.call('HDEL', KEYS[2], all[n])
  else
    names[#names + 1] = all[n]
  end
end
names[#names + 1] = worker
table.sort(names)
redis.call('HSET', KEYS[2], worker, string.format('%.6f %.6f', born, now))
redis.call('EXPIRE', KEYS[2], 60)
local place = 0
for n, name in ipairs(names) do
  if name == worker and (#names == 1 or now - born >= 2.5) then place = n end
end
local count = 0
if rate > 0 and wanted > 0 then
  local most = math.max(1, rate)
  local bucket = redis.call('HMGET', KEYS[1], 'tokens', 'at')
  local tokens, at = tonumber(bucket[1] or ''), tonumber(bucket[2] or '')
  if not tokens or not at or at > now or tokens < 0 then tokens, at = 1, now end
  tokens = math.min(most, tokens + (now - at) * rate)
  count = math.min(wanted, math.floor(tokens), math.max(1, math.floor(most / #names)))
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens - count), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', KEYS[1], 60)
end
return {count, place, #names}
