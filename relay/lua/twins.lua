-- ARGV: '1' to note or '0' to forget, then for each: digest, id. Noted is who is uncertain, forgotten who is not.
local note = ARGV[1] == '1'
local count = 0
for i = 2, #ARGV, 2 do
  local uncertain = redis.call('ZSCORE', 'smtpdup:uncertain', ARGV[i + 1])
  if note and uncertain then
    count = count + redis.call('HSETNX', 'smtpdup:twins', ARGV[i], ARGV[i + 1])
  elseif not note and not uncertain and redis.call('HGET', 'smtpdup:twins', ARGV[i]) == ARGV[i + 1] then
    count = count + redis.call('HDEL', 'smtpdup:twins', ARGV[i])
  end
end
return count
