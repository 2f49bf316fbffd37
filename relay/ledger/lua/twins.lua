-- ARGV: '1' to note or '0' to forget, then for each: digest, id. Noted is who is uncertain, forgotten who is not.
local note = ARGV[1] == '1'
local count = 0
for i = 2, #ARGV, 2 do
  local digest, id = ARGV[i], ARGV[i + 1]
  local uncertain = redis.call('ZSCORE', 'smtpdup:uncertain', id)
  local others, is_noted = {}, false
  for other in string.gmatch(redis.call('HGET', 'smtpdup:twins', digest) or '', '%S+') do
    if other == id then is_noted = true else others[#others + 1] = other end
  end
  if note and uncertain and not is_noted then
    others[#others + 1] = id
    redis.call('HSET', 'smtpdup:twins', digest, table.concat(others, ' '))
    count = count + 1
  elseif not note and not uncertain and is_noted then
    if #others == 0 then
      redis.call('HDEL', 'smtpdup:twins', digest)
    else
      redis.call('HSET', 'smtpdup:twins', digest, table.concat(others, ' '))
    end
    count = count + 1
  end
end
return count
