-- ARGV: ids. Deletes the bodies that nobody lists; returns how many.
local names, whole = destinations()
local count = 0
if not whole then return 0 end
for _, id in ipairs(ARGV) do
  local wanted = redis.call('ZSCORE', 'smtpdup:staged', id) or redis.call('ZSCORE', 'smtpdup:uncertain', id)
  if not wanted and not is_listed(names, id) then count = count + forget_body(id, whole) end
end
return count
