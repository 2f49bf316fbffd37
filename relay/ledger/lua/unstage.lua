-- ARGV: key of what a spool has brought in, '1' to strike the notes from it, then ids, or notes (which begin with
-- one), of messages that are, or were, in the spool.
-- A stage that timed out may have been written nevertheless, even after the import: it must not become uncertain later.
-- A message that the import itself made uncertain is still noted as imported, and stays.
local names, whole = destinations()
local count = 0
for i = 3, #ARGV do
  local id = string.match(ARGV[i], '^[^%-]+')
  local gone = redis.call('ZREM', 'smtpdup:staged', id)
  if not redis.call('ZSCORE', ARGV[1], id) then
    gone = gone + redis.call('ZREM', 'smtpdup:uncertain', id)
  end
  if ARGV[2] == '1' then
    redis.call('ZREM', ARGV[1], ARGV[i])
  end
  if gone > 0 then
    count = count + 1
    if not redis.call('ZSCORE', 'smtpdup:uncertain', id) and not is_listed(names, id) then
      forget_body(id, whole)
      redis.call('HDEL', 'smtpdup:covered', id)
    end
  end
end
return count
