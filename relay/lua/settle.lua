-- ARGV: destination, ids. A body goes when no destination has its id pending or failed.
local destination = ARGV[1]
local pending = 'smtpdup:pending:' .. destination
local ids = {}
for i = 2, #ARGV do ids[i - 1] = ARGV[i] end
redis.call('ZREM', 'smtpdup:busy:' .. destination, unpack(ids))
redis.call('HDEL', 'smtpdup:holders:' .. destination, unpack(ids))
local there = redis.call('ZMSCORE', pending, unpack(ids))
local settled = {}
for i, id in ipairs(ids) do
  if there[i] then settled[#settled + 1] = id end
end
if #settled == 0 then
  return 0
end
local count = redis.call('ZREM', pending, unpack(settled))
redis.call('HDEL', 'smtpdup:own:' .. destination, unpack(settled))
local unwanted = settled
for _, other in ipairs(redis.call('HKEYS', 'smtpdup:destinations')) do
  for _, list in ipairs({'smtpdup:pending:', 'smtpdup:failed:'}) do
    -- They have just left our own pending list, which may be long.
    if #unwanted > 0 and list .. other ~= pending and redis.call('EXISTS', list .. other) == 1 then
      local wanted = redis.call('ZMSCORE', list .. other, unpack(unwanted))
      local rest = {}
      for i, id in ipairs(unwanted) do
        if not wanted[i] then rest[#rest + 1] = id end
      end
      unwanted = rest
    end
  end
end
if #unwanted > 0 then
  local keys = {}
  for i, id in ipairs(unwanted) do keys[i] = 'smtpdup:message:' .. id end
  redis.call('DEL', unpack(keys))
end
redis.call('HINCRBY', 'smtpdup:counters', 'delivered:' .. destination, count)
return count
