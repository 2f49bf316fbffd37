-- ARGV: ids. Deletes the bodies that nobody lists; returns how many.
local destinations = redis.call('HKEYS', 'smtpdup:destinations')
local count = 0
for _, id in ipairs(ARGV) do
  local wanted = redis.call('ZSCORE', 'smtpdup:staged', id) or redis.call('ZSCORE', 'smtpdup:uncertain', id)
  for _, name in ipairs(destinations) do
    wanted = wanted or redis.call('ZSCORE', 'smtpdup:pending:' .. name, id) or redis.call('ZSCORE', 'smtpdup:failed:' .. name, id)
  end
  if not wanted then
    count = count + redis.call('DEL', 'smtpdup:message:' .. id)
  end
end
return count
