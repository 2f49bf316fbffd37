-- ARGV: ids.
local names, whole = destinations()
local count = 0
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', 'smtpdup:staged', id) + redis.call('ZREM', 'smtpdup:uncertain', id) > 0 then
    if not is_listed(names, id) then forget_body(id, whole) end
    redis.call('HDEL', 'smtpdup:covered', id)
    count = count + 1
  end
end
return count
