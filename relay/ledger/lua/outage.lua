-- ARGV: destination, '1' for begun or '0' for over, when, reason, the most that are kept. The first of the list is the
-- last outage; one that goes on has no end, and one that began at the same moment goes on: another worker of the same
-- backup, which works, has said that it is over. Returns how many there are.
local key = 'smtpdup:outages:' .. ARGV[1]
local head = redis.call('LINDEX', key, 0)
local sound, last = pcall(cjson.decode, head or '')
local goes_on = sound and type(last) == 'table' and tonumber(last['end']) == 0
if ARGV[2] == '1' then
  if goes_on or (sound and type(last) == 'table' and tonumber(last.begin) == tonumber(ARGV[3])) then
    last['end'] = 0
    last.reason = ARGV[4]
    redis.call('LSET', key, 0, cjson.encode(last))
  else
    redis.call('LPUSH', key, cjson.encode({begin = tonumber(ARGV[3]), ['end'] = 0, reason = ARGV[4]}))
    redis.call('LTRIM', key, 0, tonumber(ARGV[5]) - 1)
  end
elseif goes_on then
  last['end'] = tonumber(ARGV[3])
  redis.call('LSET', key, 0, cjson.encode(last))
end
return redis.call('LLEN', key)
