-- ARGV: destination, id, how often the copy was tried before, the most groups, then for each group JSON, see
-- ledger/divergence.py. Goes before the change of the copy's state in the same MULTI, and counts nothing once that is
-- done. Returns how many groups were counted in.
local destination, id, most = ARGV[1], ARGV[2], tonumber(ARGV[4])
if not redis.call('ZSCORE', 'smtpdup:pending:' .. destination, id) then return 0 end
local state = redis.call('HGET', 'smtpdup:own:' .. destination, id) or ''
if (string.match(state, '"a":(%d+)') or '0') ~= ARGV[3] then return 0 end
local groups = 'smtpdup:divergence:' .. destination
local seconds, now = clock()
local hour = math.floor(seconds / 3600)

local function group_of(group)
  if redis.call('ZSCORE', groups, group.key) then return group.key end
  local count = redis.call('ZCARD', groups)
  for _, other in ipairs({'other', 'other-deferred', 'other-given-up'}) do
    if redis.call('ZSCORE', groups, other) then count = count - 1 end
  end
  return count < most and group.key or group.other
end

local function count_in(group)
  local key = group_of(group)
  local place = destination .. ':' .. key
  local hash = 'smtpdup:diverged:' .. place
  if redis.call('HSETNX', hash, 'first', now) == 1 then
    redis.call('HSET', hash, 'kind', group.kind)
    if key == group.key then
      for _, field in ipairs({'stage', 'code', 'status', 'text', 'class', 'own'}) do
        redis.call('HSET', hash, field, group[field])
      end
    end
    redis.call('HSET', hash, 'reply', group.reply)
  end
  if group.soft == 1 then redis.call('HSET', hash, 'soft', 1) end
  redis.call('ZADD', groups, now, key)
  redis.call('HSET', hash, 'last', now)
  redis.call('HINCRBY', hash, 'seen', group.seen)
  redis.call('HINCRBY', hash, 'messages', group.messages)
  redis.call('HINCRBY', hash, 'h' .. hour, group.seen)
  local examples = 'smtpdup:examples:' .. place
  redis.call('ZADD', examples, now, id)
  if redis.call('ZCARD', examples) > 20 then redis.call('ZREMRANGEBYRANK', examples, 10, 10) end
  local whom = 'smtpdup:whom:' .. place
  for _, who in ipairs(group.whom) do
    if redis.call('ZSCORE', whom, who[1]) or redis.call('ZCARD', whom) < 200 then
      redis.call('ZINCRBY', whom, 1, who[1])
      if who[2] ~= '' then redis.call('HSETNX', 'smtpdup:sealed:' .. place, who[1], who[2]) end
    else
      redis.call('HINCRBY', hash, 'more', 1)
    end
  end
  for _, domain in ipairs(group.domains) do
    local field = 'd:' .. domain[1]
    if redis.call('HEXISTS', hash, field) == 0 and tonumber(redis.call('HGET', hash, 'domains') or 0) >= 50 then
      field = 'more_domains'
    elseif redis.call('HINCRBY', hash, field, 0) == 0 then
      redis.call('HINCRBY', hash, 'domains', 1)
    end
    redis.call('HINCRBY', hash, field, domain[2])
  end
end

-- What somebody has done to these keys must not keep a copy from its end.
local counted = 0
for i = 5, #ARGV do
  if pcall(count_in, cjson.decode(ARGV[i])) then counted = counted + 1 end
end
return counted
