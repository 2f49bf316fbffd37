-- ARGV: destination, '1' to drop pending copies instead of failed ones, ids.
local destination = ARGV[1]
local list, states = 'smtpdup:failed:' .. destination, 'smtpdup:failure:' .. destination
if ARGV[2] == '1' then
  list, states = 'smtpdup:pending:' .. destination, 'smtpdup:own:' .. destination
end
local names, whole = destinations()
local count = 0
for i = 3, #ARGV do
  local id = ARGV[i]
  if redis.call('ZREM', list, id) == 1 then
    turned(destination, {redis.call('HGET', states, id) or ''}, {}, 'dropped', 0)
    redis.call('HDEL', states, id)
    if ARGV[2] == '1' then
      redis.call('ZREM', 'smtpdup:busy:' .. destination, id)
      redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
    end
    count = count + 1
    if not is_listed(names, id) then forget_body(id, whole) end
  end
end
return count
