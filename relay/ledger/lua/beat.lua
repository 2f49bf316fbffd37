-- ARGV: relay process, its sign of life as JSON but for the brace at its beginning. Notes it with the time, and returns
-- {topology, intent, state of the map of moved mailboxes}, each '' for none. What stands there may be anything, also another type of key; a Redis that takes
-- no more writes can be read all the same.
local _, at = clock()
redis.pcall('HSET', 'smtpdup:relays', ARGV[1], '{"at": ' .. at .. ', ' .. ARGV[2])

local function read(key)
  local found = redis.pcall('GET', key)
  return type(found) == 'string' and found or ''
end

return {read('smtpdup:topology'), read('smtpdup:intent'), read('smtpdup:moved-state')}
