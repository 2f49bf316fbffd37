-- ARGV: for each message: id, its owner's deadline, record.
-- Listed before it is written: a body that nobody lists is a leak.
local listed, written = {}, {}

local function flush()
  redis.call('ZADD', 'smtpdup:staged', unpack(listed))
  redis.call('MSET', unpack(written))
  listed, written = {}, {}
end

for i = 1, #ARGV, 3 do
  local n = #listed
  listed[n + 1], listed[n + 2] = ARGV[i + 1], ARGV[i]
  written[n + 1], written[n + 2] = 'smtpdup:message:' .. ARGV[i], ARGV[i + 2]
  -- Lua takes some 8,000 arguments.
  if n >= 2000 then flush() end
end
if #listed > 0 then flush() end
return #ARGV / 3
