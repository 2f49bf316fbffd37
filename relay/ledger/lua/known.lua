-- ARGV: the ledger's identity as the caller knows it ('' for none), the count it has seen, a new identity, 1 to count on.
-- Returns identity, count, the change found by this call ('' for none), 1 if the index of lists is complete, and the last
-- change, by whichever process it was found.
-- Only the first process that finds a change gets it as found by this call.
local key = 'smtpdup:ledger'
local time = redis.call('TIME')
local id, count, before = unpack(redis.call('HMGET', key, 'id', 'count', 'before'))
local cause = ''
if ARGV[1] ~= '' and id ~= ARGV[1] then
  if not id then
    cause = 'emptied'
  elseif before ~= ARGV[1] then
    cause = 'replaced'
  end
elseif id and ARGV[1] ~= '' and tonumber(count or 0) < tonumber(ARGV[2]) then
  cause = 'older'
end
if not id or cause == 'older' then
  id = ARGV[3]
  redis.call('HSET', key, 'id', id, 'since', time[1])
end
if cause ~= '' then
  redis.call('HSET', key, 'before', ARGV[1], 'cause', cause, 'doubt', time[1] .. '.' .. string.format('%06d', time[2]))
end
count = redis.call('HINCRBY', key, 'count', ARGV[4])
return {id, count, cause, redis.call('SISMEMBER', 'smtpdup:lists', ''), redis.call('HGET', key, 'cause') or ''}
